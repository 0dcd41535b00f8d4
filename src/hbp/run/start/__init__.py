"""Before a run starts: whose its folder is, and what the launcher says."""
