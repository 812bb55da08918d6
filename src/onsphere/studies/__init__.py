"""The paper's claims, one file each, run by one runner into records."""
