"""The quickstart (`make run`): both stages on a small model and text that ships with the project."""
