"""What the tests of hostile input share."""

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# Values for any field of a JSON file.
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3, 7, 2**31, 2**63, 10**40, -(10**40), 1e308, float("nan")]),
    st.sampled_from(["", "8", "llama", "../x", "\x00", "é" * 300]),
    st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "content"]), st.integers()),
)


def cases(count):
    """The same cases in every run, so many of them; failing ones as they are, small anyway."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def one_line(error):
    """The message of an ``InputError``, which says what is wrong and shows no control character."""
    message = str(error)
    assert message
    assert message.isprintable(), message
    assert len(message) < 1000
    return message
