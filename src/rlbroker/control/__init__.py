"""Commands and the record of what became of them, and of every version, at every worker."""
