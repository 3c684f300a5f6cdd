"""Support for tests of memfaas and of programs that use it; nothing else imports it."""
