"""What a command shows: sentences and tables, bars, the stages of a preparation."""
