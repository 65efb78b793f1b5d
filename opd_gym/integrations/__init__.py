"""This library's envs in the programs of other libraries."""
