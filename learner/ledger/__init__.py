"""The ledger: it grants leases, stores scored groups, hands out batches, and accounts for every prompt visit."""
