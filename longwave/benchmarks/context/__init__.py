"""`longwave bench context`: how time and memory grow while one sequence of real text grows, beside a dense model."""
