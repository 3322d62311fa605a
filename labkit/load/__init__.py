"""Every writer and schedule that loads a map or a ring."""
