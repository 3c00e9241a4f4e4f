"""Speed, memory and tuning runs that stand behind figures in the documents; none of them is a test."""
