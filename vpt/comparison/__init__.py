"""Methods side by side: what is trained, what it cost, and a report of both."""
