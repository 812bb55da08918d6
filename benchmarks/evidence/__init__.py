"""Does training on spheres help? Tuned base optimizers against ours, on three real tasks.

``python -m benchmarks.evidence --data-dir DIR --out DIR`` runs everything on all cores, goes on
where it was stopped, and writes the report; ``docs/results/training.md`` says what came out.
"""
