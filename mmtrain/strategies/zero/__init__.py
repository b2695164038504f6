"""DeepSpeed's ZeRO as a strategy. DeepSpeed itself is imported when a run uses it, never before."""
