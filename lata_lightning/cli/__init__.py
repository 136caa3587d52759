"""The command ``lata``: parse, call, print. Heavy imports happen inside the commands, so that help is quick."""
