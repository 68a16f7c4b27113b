import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.Random;
import java.util.TreeMap;
import java.util.zip.CRC32;

/**
 * A small service on a JVM: entries that follow from the user's name, and what was added since.
 *
 * <p>{@code java Ledger PORT USER MIB} listens on every address. {@code GET /state} reads every entry and answers
 * with the process's incarnation, the number of entries, those added, and a checksum of all; {@code GET /add}
 * adds one first.
 */
public final class Ledger {
    private static final int ENTRY_BYTES = 1024;

    private final long incarnation = System.nanoTime();
    private final TreeMap<Integer, byte[]> entries = new TreeMap<>();
    private final Random random;
    private int added;

    private Ledger(String user, int mebibytes) {
        random = new Random(user.hashCode());
        for (int entry = 0; entry < mebibytes * 1024; entry++) {
            append();
        }
    }

    private void append() {
        byte[] entry = new byte[ENTRY_BYTES];
        random.nextBytes(entry);
        entries.put(entries.size(), entry);
    }

    private synchronized String answer(String path) {
        if (path.equals("/add")) {
            append();
            added++;
        }
        CRC32 checksum = new CRC32();
        entries.values().forEach(checksum::update);
        return String.format("{\"incarnation\":%d,\"entries\":%d,\"added\":%d,\"checksum\":%d}",
            incarnation, entries.size(), added, checksum.getValue());
    }

    private void handle(HttpExchange exchange) throws IOException {
        byte[] body = answer(exchange.getRequestURI().getPath()).getBytes(StandardCharsets.UTF_8);
        exchange.sendResponseHeaders(200, body.length);
        try (exchange) {
            exchange.getResponseBody().write(body);
        }
    }

    /** See the class. */
    public static void main(String[] arguments) throws IOException {
        Ledger ledger = new Ledger(arguments[1], Integer.parseInt(arguments[2]));
        HttpServer server =
            HttpServer.create(new InetSocketAddress(Integer.parseInt(arguments[0])), 0);
        server.createContext("/", ledger::handle);
        server.start();
    }
}
