import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import org.apache.http.client.config.RequestConfig;
import org.apache.http.client.methods.CloseableHttpResponse;
import org.apache.http.client.methods.HttpGet;
import org.apache.http.conn.ConnectionPoolTimeoutException;
import org.apache.http.impl.client.CloseableHttpClient;
import org.apache.http.impl.client.HttpClients;
import org.apache.http.impl.conn.PoolingHttpClientConnectionManager;
import org.apache.http.util.EntityUtils;

/**
 * Requests prices from a server: {@code Prices LIMIT}, with at most LIMIT connections. For each line
 * {@code TIMES URL} of its input it sends TIMES requests, and prints how many were answered, failed, or found no
 * connection left, and how many connections are in use.
 */
public final class Prices {
    private final PoolingHttpClientConnectionManager pool = new PoolingHttpClientConnectionManager();
    private final CloseableHttpClient http;

    private Prices(int limit) {
        pool.setMaxTotal(limit);
        pool.setDefaultMaxPerRoute(limit);
        // Milliseconds to wait for a connection of the pool. The default is to wait forever.
        RequestConfig config = RequestConfig.custom().setConnectionRequestTimeout(10).build();
        http = HttpClients.custom().setConnectionManager(pool).setDefaultRequestConfig(config).build();
    }

    private String price(String url) throws IOException {
        CloseableHttpResponse response = http.execute(new HttpGet(url));
        if (response.getStatusLine().getStatusCode() != 200) {
            // The leak: the response is never closed, and its connection never returns to the pool.
            return null;
        }
        try (response) {
            return EntityUtils.toString(response.getEntity());
        }
    }

    private String ask(int times, String url) throws IOException {
        int answered = 0;
        int failed = 0;
        int refused = 0;
        for (int left = times; left > 0; left--) {
            try {
                if (price(url) == null) {
                    failed++;
                } else {
                    answered++;
                }
            } catch (ConnectionPoolTimeoutException full) {
                refused++;
            }
        }
        int leased = pool.getTotalStats().getLeased();
        return "answered=" + answered + " failed=" + failed + " refused=" + refused + " leased=" + leased;
    }

    public static void main(String[] arguments) throws IOException {
        Prices prices = new Prices(Integer.parseInt(arguments[0]));
        BufferedReader orders = new BufferedReader(new InputStreamReader(System.in));
        for (String order = orders.readLine(); order != null; order = orders.readLine()) {
            String[] words = order.split(" ");
            System.out.println(prices.ask(Integer.parseInt(words[0]), words[1]));
        }
    }
}
