"""Stories from production, run on one machine: the systems of the article's last chapter."""
