"""One round, and the loop that runs rounds: who is asked, what comes back, what is made of it, who sees it."""
