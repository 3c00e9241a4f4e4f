"""Memory and time of a training before it starts, by arithmetic: cell.py has the function to call, forecast.py above is the entry."""
