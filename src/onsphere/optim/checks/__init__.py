"""What optimizers on spheres refuse, and what they warn of."""
