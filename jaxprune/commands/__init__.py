"""What ``jaxprune …`` runs: one module a command, flags in, files and one line out."""
