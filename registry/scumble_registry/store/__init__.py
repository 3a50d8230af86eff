"""Where the embedded registry keeps things: blobs as files, versions and aliases in a database, a cache of folders."""
