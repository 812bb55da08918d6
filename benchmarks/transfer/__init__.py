"""Does one number transfer? Best rotation against best rate, from a small model to larger ones.

``python -m benchmarks.transfer --data-dir DIR --out DIR`` tunes small networks, makes them wider,
deeper, their batches larger and their runs longer, tunes each anew, and says how far the optimum
moved and what it costs to keep the small model's setting; ``docs/results/transfer.md`` says what
came out.
"""
