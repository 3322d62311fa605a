"""Pure judging of saved runs: histories, checkers, statistics, findings and figures."""
