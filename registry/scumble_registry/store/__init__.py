"""The embedded registry's storage: blobs as files, versions and aliases in a database, a cache of folders."""
