"""PyTorch forms of what the benchmark measures, as one would write them there. Not used elsewhere.

``torch`` is optional: ``available()`` says whether it can be imported.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np


def available(*others: str) -> bool:
    """Whether PyTorch is installed, and other packages with it."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", *others))


def tensors(arrays: Any, device: str) -> list:
    """Arrays as tensors on a device."""
    import torch

    return [torch.tensor(np.asarray(array), device=device) for array in arrays]


def wait(device: str) -> None:
    """Until the device has finished."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def _causal(n: int, device: Any) -> Any:
    import torch

    return torch.full((n, n), float("-inf"), device=device).triu(1)


def softmax_error_gradients(q: Any, k: Any, q0: Any, k0: Any) -> tuple:
    """Error of all heads together, and its gradients in ``q`` and ``k`` by autograd."""
    import torch

    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    bias = _causal(q.shape[-2], q.device)
    with torch.no_grad():
        target = torch.softmax(q0 @ k0.mT + bias, -1)
    error = 0.5 * ((torch.softmax(q @ k.mT + bias, -1) - target) ** 2).sum()
    return error.detach(), *torch.autograd.grad(error, (q, k))


def attention_of(q: Any, k: Any) -> Any:
    """Causal attention matrices of all heads, as what is kept between steps."""
    import torch

    queries, keys = tensors((q, k), "cpu")
    return torch.softmax(queries @ keys.mT + _causal(queries.shape[-2], "cpu"), -1).numpy()


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    import torch

    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def query_key_step(
    x: Any,
    wq: Any,
    wk: Any,
    target: Any,
    values: Any,
    grouped: tuple[int, int],
    scale: float,
    rotary: Any,
) -> tuple:
    """Error of a layer's attention and of its output, and gradients in ``wq`` and ``wk``.

    The dense attention matrices ``[b, g, r, n, n]`` and values ``[b, g, r, n, v]`` are given.
    """
    import torch

    heads, groups = grouped
    b, n, _ = x.shape
    angles = torch.arange(n, device=x.device)[:, None] * torch.tensor(
        np.asarray(rotary), device=x.device
    )
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    wq, wk = wq.detach().requires_grad_(), wk.detach().requires_grad_()
    q = (x @ wq).reshape(b, n, groups, heads // groups, -1).permute(0, 2, 3, 1, 4)
    k = (x @ wk).reshape(b, n, groups, 1, -1).permute(0, 2, 3, 1, 4)
    q, k = _rotated(q, cos, sin) * scale, _rotated(k, cos, sin)
    difference = torch.softmax(q @ k.mT + _causal(n, x.device), -1) - target
    error = 0.5 * ((difference**2).sum() + ((difference @ values) ** 2).sum()) / b
    return error.detach(), *torch.autograd.grad(error, (wq, wk))


def llama_logits(config: Any) -> Any:
    """A function of token ids: logits of a Llama of this shape, as ``transformers`` has it."""
    import torch
    import transformers

    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    model = transformers.LlamaForCausalLM(shape).eval()

    def logits(tokens: Any) -> Any:
        with torch.no_grad():
            return model(tokens.long()).logits

    return logits


def per_head(function: Any, *tensors: Any) -> list:
    """A function of batched tensors, one entry of the leading axis at a time."""
    return [function(*(t[i : i + 1] for t in tensors)) for i in range(tensors[0].shape[0])]


def algorithm1(x: Any, w: Any, lam: float, rate: float, steps: int) -> Any:
    """Masks after ``steps`` of gradient descent from ones, for heads on the leading axis."""
    import torch

    bias = _causal(x.shape[-2], x.device)
    mask = torch.ones_like(w, requires_grad=True)
    with torch.no_grad():
        target = torch.softmax(x @ w @ x.mT + bias, -1)
    for _ in range(steps):
        attention = torch.softmax(x @ (mask * w) @ x.mT + bias, -1)
        loss = 0.5 * ((attention - target) ** 2).sum() + 0.5 * lam * (mask**2).sum()
        (gradient,) = torch.autograd.grad(loss, mask)
        with torch.no_grad():
            mask -= rate * gradient
    return mask.detach()


def wanda(x: Any, w: Any, ratio: float) -> Any:
    """Wanda on a weight ``[d_in, d_out]``: the lowest scores of every output are dropped."""
    import torch

    weight = w.mT.clone()
    scores = weight.abs() * x.reshape(-1, x.shape[-1]).norm(dim=0)
    order = torch.sort(scores, dim=-1, stable=True)[1][:, : int(weight.shape[1] * ratio)]
    return weight.scatter_(1, order, 0).mT


def sparsegpt(x: Any, w: Any, ratio: float, block: int = 128, damping: float = 0.01) -> Any:
    """SparseGPT on a weight ``[d_in, d_out]``, the published loop over columns."""
    import torch

    weight = w.mT.clone()
    flat = x.reshape(-1, x.shape[-1])
    h = 2 * flat.mT @ flat / x.shape[0]
    h += damping * h.diagonal().mean() * torch.eye(h.shape[0], device=h.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        part, square = weight[:, start:stop].clone(), u[start:stop, start:stop]
        errors = torch.zeros_like(part)
        scores = part**2 / square.diagonal() ** 2
        threshold = scores.flatten().sort()[0][int(scores.numel() * ratio)]
        dropped = scores < threshold
        for i in range(stop - start):
            column = part[:, i]
            pruned = torch.where(dropped[:, i], 0.0, column)
            errors[:, i] = (column - pruned) / square[i, i]
            part[:, i:] -= errors[:, i : i + 1] @ square[i : i + 1, i:]
            part[:, i] = pruned
        weight[:, start:stop] = part
        weight[:, stop:] -= errors @ u[start:stop, stop:]
    return weight.mT
