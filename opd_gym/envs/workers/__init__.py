"""Worker processes that host envs."""
