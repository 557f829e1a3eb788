"""All constants measured when the first site goes."""
measure_once = True
