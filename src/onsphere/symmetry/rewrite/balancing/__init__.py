"""How far weights and channels move: least norms, equal ranges; and what may move at all."""
