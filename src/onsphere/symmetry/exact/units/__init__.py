"""What a tensor scales by, as linear forms in unknown exponents: whole, and along its axes."""
