"""The suites: abstract test classes, one for each contract. pytest rewrites the assertions in here (`mdevkit_testkit.plugin`)."""
