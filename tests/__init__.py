"""A package, so that `tests.support` can be imported from every folder of tests and from the benchmarks' own."""
