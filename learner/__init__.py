"""The learner, which trains the policy, and beside it the ledger, which decides what it trains on."""
