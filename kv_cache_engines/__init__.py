"""Connectors of engines and libraries to `kv_cache_manager`, one module each, by its public names only.

This package imports none of them: only the module that is asked for imports its engine.
"""
