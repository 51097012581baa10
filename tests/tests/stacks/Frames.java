import java.io.BufferedReader;
import java.io.Closeable;
import java.io.InputStreamReader;
import java.net.InetSocketAddress;
import java.nio.channels.SocketChannel;
import java.util.List;
import java.util.TreeSet;
import java.util.stream.Stream;

/**
 * Obeys standard input. `connect` connects to the port that is the argument. A call path, as the letters of its
 * steps, closes the connection at its end, and first prints the frames that the JVM itself shows at that moment.
 * `warm` takes all steps so often that they are compiled.
 */
final class Frames {
    private static final String STEPS = "lrsfgmt";
    private static final int OFTEN = 20_000;

    interface Step {
        void take(Closeable connection, String rest) throws Exception;
    }

    static void say(Closeable connection) throws Exception {
        if (connection instanceof SocketChannel socket) {
            StringBuilder line = new StringBuilder();
            line.append(((InetSocketAddress) socket.getLocalAddress()).getPort());
            StackTraceElement[] frames = new Throwable().getStackTrace();
            // The first is this method's own.
            for (int i = 1; i < frames.length; i++) {
                StackTraceElement it = frames[i];
                line.append(' ').append(it.getClassName()).append('.').append(it.getMethodName());
                line.append(':').append(it.getLineNumber());
            }
            System.out.println(line);
        }
    }

    static void hangUp(Closeable connection) throws Exception {
        // On one line, so that the frame is at the same line both times.
        say(connection); connection.close();
    }

    static void step(Closeable connection, String rest) throws Exception {
        if (rest.isEmpty()) {
            hangUp(connection);
            return;
        }
        String further = rest.substring(1);
        switch (rest.charAt(0)) {
            case 'l' -> left(connection, further);
            case 'r' -> new Right().take(connection, further);
            case 's' -> sorts(connection, further);
            case 'f' -> fails(connection, further);
            case 'g' -> streams(connection, further);
            case 'm' -> Frames.class.getDeclaredMethod("step", Closeable.class, String.class)
                .invoke(null, connection, further);
            default -> locks(connection, further);
        }
    }

    static void left(Closeable connection, String rest) throws Exception {
        step(connection, rest);
    }

    static final class Right implements Step {
        @Override
        public void take(
            Closeable connection,
            String rest
        ) throws Exception {
            step(
                connection,
                rest
            );
        }
    }

    static int compared(Closeable connection, String rest) {
        try {
            step(connection, rest);
            return 0;
        } catch (Exception exception) {
            throw new IllegalStateException(exception);
        }
    }

    /** The JDK calls the program, through a method that the JVM makes. */
    static void sorts(Closeable connection, String rest) {
        new TreeSet<String>((one, other) -> compared(connection, rest)).add(rest);
    }

    static void streams(Closeable connection, String rest) {
        Stream.of(rest).map(String::length).filter(it -> compared(connection, rest) == 0).forEach(List::of);
    }

    static void fails(Closeable connection, String rest) throws Exception {
        try {
            throw new IllegalArgumentException();
        } catch (IllegalArgumentException expected) {
            step(connection, rest);
        }
    }

    static synchronized void locks(Closeable connection, String rest) throws Exception {
        long sum = 0;
        for (int i = 0; i < rest.length() + 3; i++) {
            sum += i;
        }
        step(connection, sum < 0 ? "" : rest);
    }

    public static void main(String[] arguments) throws Exception {
        InetSocketAddress server = new InetSocketAddress("127.0.0.1", Integer.parseInt(arguments[0]));
        BufferedReader orders = new BufferedReader(new InputStreamReader(System.in));
        System.out.println("ready");
        SocketChannel connection = null;
        for (String order = orders.readLine(); order != null; order = orders.readLine()) {
            switch (order) {
                case "connect" -> {
                    connection = SocketChannel.open(server);
                    System.out.println("connected");
                }
                case "warm" -> {
                    for (int i = 0; i < OFTEN; i++) {
                        step(() -> {}, STEPS);
                    }
                    System.out.println("warm");
                }
                default -> step(connection, order);
            }
        }
    }
}
