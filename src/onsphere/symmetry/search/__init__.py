"""What is looked for with the numbers: granularity, parts, shifts, weights without effect."""
