"""What reads finished cells for people: the report's page and tables, the comparison of two result sets, advice."""
