"""Alembic's migrations. They lie inside the package so that they also work from a wheel."""
