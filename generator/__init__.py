"""The generator: one SGLang engine that turns leases into groups of completions."""
