"""What talks to AWS; nothing here is loaded unless AWS is used, and boto3 only by what needs it."""
