"""How much of the clients' text can be read off what leaves them: a round replayed, attacked, and scored."""
