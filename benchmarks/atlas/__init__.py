"""The atlas: audits of the architectures that people use, as records for a page of the docs."""
