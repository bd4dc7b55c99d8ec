import java.io.IOException;
import java.io.OutputStream;
import java.net.InetSocketAddress;
import org.eclipse.jetty.server.Server;
import org.eclipse.jetty.server.handler.ContextHandler;
import software.amazon.dynamodb.services.local.server.LocalDynamoDBRequestHandler;
import software.amazon.dynamodb.services.local.server.LocalDynamoDBServerHandler;

/**
 * DynamoDB Local in memory, on 127.0.0.1 alone: its own ServerRunner listens on every interface, and reports its use.
 * Arguments: a port, 0 for a free one; what to print once it answers, where PORT is the port; true to end with stdin.
 */
public class DynamoDbLocal {
  public static void main(String[] arguments) throws Exception {
    Server server = new Server(new InetSocketAddress("127.0.0.1", Integer.parseInt(arguments[0])));
    // as ServerRunner for -inMemory: no port of its own, no file; as for -sharedDb: the same tables for every access key and region
    LocalDynamoDBRequestHandler tables = new LocalDynamoDBRequestHandler(0, true, null, true, false);
    server.setHandler(new ContextHandler(new LocalDynamoDBServerHandler(tables, null), "/"));
    try {
      server.start();
    } catch (IOException error) {
      System.err.println("could not start DynamoDB Local: " + error.getMessage() + ". Give another --port.");
      System.exit(1);
    }
    System.out.println(arguments[1].replace("PORT", String.valueOf(server.getURI().getPort())));
    if (Boolean.parseBoolean(arguments[2])) {
      System.in.transferTo(OutputStream.nullOutputStream());
      System.exit(0);
    }
    server.join();
  }
}
