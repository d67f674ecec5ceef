"""Mixed traffic against a server for a long time: what is sent, what is made for it, and what must hold afterwards."""
