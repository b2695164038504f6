"""Writing a checkpoint: staging, the transaction, asynchronous saves."""
