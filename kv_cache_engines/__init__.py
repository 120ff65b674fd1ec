"""Connectors of engines and libraries to `kv_cache_manager`, one module each, by its public names only.

Nothing is imported that is not asked for.
"""
