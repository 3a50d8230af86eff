"""One module per step, oldest first; `database.HEAD` names the newest."""
