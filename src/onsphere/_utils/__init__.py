"""Small helpers without a home of their own: files that are whole or not at all, missing extras."""
