"""Parts of :func:`onsphere.symmetry.equalize`: balances, what rounding loses, the report."""
