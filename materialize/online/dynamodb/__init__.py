"""Amazon DynamoDB as an online store."""

from materialize.online.dynamodb.store import DynamoDbStore

__all__ = ["DynamoDbStore"]
