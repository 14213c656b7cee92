"""What a task looks at in pictures: numbers, pages that show them, and the folder that both are written to."""
