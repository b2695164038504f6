"""Proof that a killed run resumes exactly: run, kill, resume, compare."""
