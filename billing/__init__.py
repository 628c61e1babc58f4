"""The ledger: debits GPU time per plan, in an append-only double-entry journal in PostgreSQL.

Every function takes the caller's connection inside the caller's transaction, so that a charge and the
change of state that causes it commit together. Start with `README.md` beside this file.
"""
